"""What people preferred, as a reward: recorded answers, frozen features, a Bradley-Terry model."""
