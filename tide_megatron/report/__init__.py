"""Pages made of the files that runs leave behind."""
