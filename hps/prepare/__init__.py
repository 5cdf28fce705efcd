"""What makes data: importers, candidates, rewards, and the doctor who looks at all of it."""
