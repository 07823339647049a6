"""How fast a bundle answers: each stage timed, in a process of its own for each setting."""
