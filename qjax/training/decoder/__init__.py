"""A loaded decoder trained from one record, an `Arm`: its program, the file it becomes, tuning block by block."""
