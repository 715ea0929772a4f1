"""What a run leaves on disk: the schema, the folder, the writer and the reader. Imports no torch."""
