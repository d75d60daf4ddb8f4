"""Many runs one after the other, each with other values of some options, and a table of their results."""
