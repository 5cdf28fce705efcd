"""What train.py has beside the loop: its options."""
