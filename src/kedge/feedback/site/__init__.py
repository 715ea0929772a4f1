"""The site at which people judge: pages made on the server, one small script and one style sheet of our own."""
