"""A model of the protocol that a search exhausts: every order of its steps, with crashes and delays between them."""
