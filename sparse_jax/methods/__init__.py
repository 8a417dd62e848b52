"""The methods, one family a file."""
