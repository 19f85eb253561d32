"""What a model does on text and tasks: perplexity, agreement, samples, speed and curves."""
