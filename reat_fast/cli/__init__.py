"""What the commands share: flags, one line for bad input, words for a terminal."""
