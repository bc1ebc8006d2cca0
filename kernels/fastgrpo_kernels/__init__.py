"""The fused GRPO loss."""
