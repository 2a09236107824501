"""A sampling run: options, chunks, ranks, files and status."""
