"""Inner rules, a file each: hyper-parameters, their checks, state and equation, stated once."""
