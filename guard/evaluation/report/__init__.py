"""What an evaluation found, to read: one HTML page, and a section of Markdown for a model's card."""
