"""How plans reach the trainer: stages in threads, or a process of their own."""
