"""A bundle's detection threshold and radii, fitted on clean images and then audited on others.

Folds are disjoint:

    threshold   the conformal threshold of the score
    radii       bound of Jacobian rows G, gradient bound L, modulus of continuity omega; levels of `combined`
    conformal   scale of the conformal radius
    report      realized false positive rate, accuracy, agreement, violations, tightness: looked at, never
                fitted
"""
