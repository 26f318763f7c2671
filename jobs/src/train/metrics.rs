//! Figures of a classifier on held-out data, from scores and true labels.

/// Area under the ROC curve: the chance that a random positive scores above a random negative, ties counting half.
/// NaN where one of the classes is absent.
pub(crate) fn roc_auc(scores: &[f32], positive: &[bool]) -> f64 {
    let order = descending(scores);
    let positives = positive.iter().filter(|&&is| is).count() as f64;
    let negatives = positive.len() as f64 - positives;
    let (mut above, mut pairs) = (0.0, 0.0);
    for tie in order.chunk_by(|&a, &b| scores[a] == scores[b]) {
        let here = tie.iter().filter(|&&at| positive[at]).count() as f64;
        pairs += (tie.len() as f64 - here) * (above + here / 2.0);
        above += here;
    }
    pairs / (positives * negatives)
}

/// Precision and recall at the lowest threshold that lets at most `share` of the negatives through.
pub(crate) fn at_false_positives(scores: &[f32], positive: &[bool], share: f64) -> (f64, f64) {
    let order = descending(scores);
    let positives = positive.iter().filter(|&&is| is).count() as f64;
    let negatives = positive.len() as f64 - positives;
    let (mut hits, mut alarms) = (0.0, 0.0);
    for tie in order.chunk_by(|&a, &b| scores[a] == scores[b]) {
        let here = tie.iter().filter(|&&at| positive[at]).count() as f64;
        let wrong = tie.len() as f64 - here;
        if alarms + wrong > share * negatives {
            break;
        }
        (hits, alarms) = (hits + here, alarms + wrong);
    }
    let precision = if hits + alarms > 0.0 { hits / (hits + alarms) } else { 0.0 };
    (precision, hits / positives)
}

fn descending(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    // Golden values of scikit-learn 1.9.1 (`roc_auc_score`, `roc_curve`), by jobs/reference/metrics.py.
    const SCORES: [f32; 12] = [0.9, 0.8, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1];
    const LABELS: [u8; 12] = [1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0];

    fn positive() -> Vec<bool> {
        LABELS.iter().map(|&label| label == 1).collect()
    }

    #[test]
    fn area_matches_scikit_learn() {
        assert!((roc_auc(&SCORES, &positive()) - 0.763_888_888_888_888_8).abs() < 1e-12);
        assert_eq!(roc_auc(&[0.1, 0.9], &[false, true]), 1.0);
        assert_eq!(roc_auc(&[0.1, 0.9], &[true, false]), 0.0);
        assert_eq!(roc_auc(&[0.5, 0.5], &[true, false]), 0.5);
        assert!(roc_auc(&[0.5], &[true]).is_nan());
    }

    #[test]
    fn threshold_keeps_false_positives_below_the_share() {
        // At most 1 of 6 negatives: the threshold is 0.6, with 4 of 6 positives and 1 negative above it.
        assert_eq!(at_false_positives(&SCORES, &positive(), 0.2), (0.8, 4.0 / 6.0));
        // At most none: only the score 0.9 is above every negative.
        assert_eq!(at_false_positives(&SCORES, &positive(), 0.01), (1.0, 1.0 / 6.0));
        assert_eq!(at_false_positives(&SCORES, &positive(), 1.0), (0.5, 1.0));
    }
}
