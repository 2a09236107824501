"""Time, memory and reliability, measured."""
