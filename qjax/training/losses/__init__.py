"""What is minimized: cross entropy and distillation, of whole vocabularies, of a top k, over chunks."""
