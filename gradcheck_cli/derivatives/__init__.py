"""Ways to obtain a derivative without trusting the rule under test."""
