"""What train.py has beside the loop: its options, visits, KTO's z0, the first loss, samples, run.json."""
