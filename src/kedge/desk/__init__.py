"""The built-in support desk: a small world whose gold utility is known, so that drift can be seen for what it is."""
