"""What a user trains with: the collection of tables and its lookahead."""
