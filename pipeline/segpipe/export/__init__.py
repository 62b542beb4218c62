"""What people and other tools open: tables, pictures."""
