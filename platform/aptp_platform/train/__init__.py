"""Training stages on Ray Train worker groups with DeepSpeed engines."""
