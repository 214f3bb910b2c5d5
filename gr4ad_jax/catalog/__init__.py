"""The ads that can be found: SIDs and their ads, the prefix tree, subsets and conditions."""
