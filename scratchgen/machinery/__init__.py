"""The parts that a reader of the models can skip: processes, files, the command line, the book-keeping of a run."""
