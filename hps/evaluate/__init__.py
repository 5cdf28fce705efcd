"""What goes out: metrics, judges, surveys and reports."""
