"""What is run by hand: the command line, the demo and the benchmark."""
