"""What a reader of the models need not read: processes, files, the command line, the book-keeping of a run, figures."""
