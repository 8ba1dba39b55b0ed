"""The world of photographs: real pictures, edits with exact truth, a judge, and the recipe of a photo model."""
