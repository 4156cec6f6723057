"""A run: its state and step, the loop that resumes, the text and tokens it reads, devices and processes."""
