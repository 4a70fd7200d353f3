"""The prm critic: a process reward model scores every step."""
