use std::io;
use std::time::Duration;

use farm_sys::icmp::ping;

use crate::lab::{self, ADDR_B, Lab};

#[test]
fn who_is_there_answers_and_who_is_not_costs_the_limit() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    lab.a.run(|| {
        let rtt = ping(ADDR_B.into(), 7, lab::LIMIT).unwrap();
        assert!(rtt < lab::LIMIT);
        let nobody = "198.18.0.99".parse().unwrap();
        let error = ping(nobody, 8, Duration::from_millis(50)).unwrap_err();
        let silent = matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable);
        assert!(silent, "{error}");
        assert!(error.to_string().contains("198.18.0.99"), "{error}");
        ping("::1".parse().unwrap(), 9, lab::LIMIT).unwrap();
    });
}
