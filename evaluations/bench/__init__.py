"""Every guidance method at equal cost, and how far each contrast points at the truth."""
