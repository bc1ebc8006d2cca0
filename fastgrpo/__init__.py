"""GRPO on one GPU: a fused loss that never holds a tokens x vocabulary tensor, and a lean trainer."""
