"""The rows of python -m reat_fast.verify: every op and whole steps against the reference."""
