"""Config and hardware to memory, time and cost; and what this machine really reaches."""
