"""A sampling run: its options, chunks, ranks, record, files and status."""
