"""Training: the loss under PASTA's mask, and supervised finetuning."""
