"""Dataset schemas, one file each: `FIELDS` and `to_messages(row, system=None)`; a new file here is a new format."""
