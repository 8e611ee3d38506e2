"""The same things done with other libraries, as their users would do them."""
