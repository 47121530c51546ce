"""The programs that are compared, each behind the same three calls and each run in a process of its own."""
