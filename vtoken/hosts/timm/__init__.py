"""timm VisionTransformer, Eva and NaFlexVit."""
