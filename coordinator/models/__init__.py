"""What a model is: config.json and safetensors headers -> spec. One small data file for each family."""
