"""Children of a command: started, watched, ended together."""
