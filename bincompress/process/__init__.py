"""What the program shares with the process and the machine around it: threads, signals, streams, limits, faults."""
