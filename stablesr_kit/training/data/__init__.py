"""What training runs learn from: photographs, their damaged versions, and what is computed beforehand."""
