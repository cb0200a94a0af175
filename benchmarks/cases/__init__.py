"""One file per question. Each compares a fast result with a baseline's before it lets it be timed."""
