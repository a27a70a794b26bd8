"""A reward of what people preferred: recorded answers, frozen features, a Bradley-Terry model."""
