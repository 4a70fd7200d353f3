"""Critics: who scores a reasoning step."""
