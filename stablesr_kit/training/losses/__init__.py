"""What training runs minimise."""
